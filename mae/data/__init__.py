"""Images, clips, volumes and sound from folders, as uint8 tensors: whatever people have, broken files included."""

from mae.data.errors import DataError, DataWarning, counted, printable
from mae.data.loader import Batches, Crops, TrainingImages, on_device, random_box, read_pictures
from mae.data.pictures import Picture, read_image, resize_and_crop, to_tensor
from mae.data.readers import Reading, Wanted, is_sound
from mae.data.sources import find_images, find_labelled_images

__all__ = [
    "Batches",
    "Crops",
    "DataError",
    "DataWarning",
    "Picture",
    "Reading",
    "TrainingImages",
    "Wanted",
    "counted",
    "find_images",
    "find_labelled_images",
    "is_sound",
    "on_device",
    "printable",
    "random_box",
    "read_image",
    "read_pictures",
    "resize_and_crop",
    "to_tensor",
]
