"""Images, clips, volumes and sound from folders and datasets, as uint8 tensors: whatever people have, broken or not."""

from mae.data.crops import Crops, TensorImages, TrainingImages, random_box
from mae.data.errors import DataError, DataWarning, Unreachable, Unreadable, counted, printable
from mae.data.labels import Labelled, open_labelled, open_train_and_test
from mae.data.loader import Batch, Batches, on_device
from mae.data.order import Order, StreamOrder
from mae.data.pictures import Picture, read_image, resize_and_crop, to_tensor
from mae.data.readers import Reading, Wanted, is_sound
from mae.data.sources import ImageFiles, Joined, Part, Source, find_images, find_labelled_images, held_out, open_source
from mae.data.whole import read_pictures, whole_batches
from mae.data.workers import usable_workers

__all__ = [
    "Batch",
    "Batches",
    "Crops",
    "DataError",
    "DataWarning",
    "ImageFiles",
    "Joined",
    "Labelled",
    "Order",
    "Part",
    "Picture",
    "Reading",
    "Source",
    "StreamOrder",
    "TensorImages",
    "TrainingImages",
    "Unreachable",
    "Unreadable",
    "Wanted",
    "counted",
    "find_images",
    "find_labelled_images",
    "held_out",
    "is_sound",
    "on_device",
    "open_labelled",
    "open_source",
    "open_train_and_test",
    "printable",
    "random_box",
    "read_image",
    "read_pictures",
    "resize_and_crop",
    "to_tensor",
    "usable_workers",
    "whole_batches",
]
