"""What ``import mae`` offers; __init__.py reads it here."""

from mae.checkpoints.checkpoint import CheckpointError as CheckpointError
from mae.checkpoints.checkpoint import CheckpointWarning as CheckpointWarning
from mae.checkpoints.checkpoint import load_checkpoint as load_checkpoint
from mae.checkpoints.checkpoint import save_checkpoint as save_checkpoint
from mae.checkpoints.convert import convert_checkpoint as convert_checkpoint
from mae.model import MODELS as MODELS
from mae.model import Classifier as Classifier
from mae.model import HeadConfig as HeadConfig
from mae.model import MAEConfig as MAEConfig
from mae.model import MAEOutput as MAEOutput
from mae.model import MaskedAutoencoder as MaskedAutoencoder
from mae.model import Reconstruction as Reconstruction
from mae.model import VisionTransformer as VisionTransformer
from mae.model import mae_vit_base_patch16 as mae_vit_base_patch16
from mae.model import mae_vit_base_video as mae_vit_base_video
from mae.model import mae_vit_base_volume as mae_vit_base_volume
from mae.model import mae_vit_demo_patch7 as mae_vit_demo_patch7
from mae.model import mae_vit_huge_patch14 as mae_vit_huge_patch14
from mae.model import mae_vit_large_patch16 as mae_vit_large_patch16
from mae.model import mae_vit_large_video as mae_vit_large_video
from mae.model import mae_vit_small_patch16 as mae_vit_small_patch16
from mae.model import mae_vit_small_video as mae_vit_small_video
from mae.model import mae_vit_tiny_patch16 as mae_vit_tiny_patch16
from mae.training.optimizers import adamw as adamw
from mae.training.optimizers import muon as muon
from mae.training.step import TrainingStep as TrainingStep
