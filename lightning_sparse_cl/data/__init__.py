"""Data: sources of images, task sequences made of them, and the data module that serves one task at a time."""

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.data.class_split import ClassSplit
from lightning_sparse_cl.data.csv_files import CSVSource
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.domains import (
    Permuted,
    PermutedDigits,
    PermutedMNIST,
    Rotated,
    RotatedDigits,
    RotatedMNIST,
)
from lightning_sparse_cl.data.foreign_modules import Tasks
from lightning_sparse_cl.data.growing_folder import GrowingImageFolder
from lightning_sparse_cl.data.image_files import ImageFolderSource, MiniImageNetSource, TinyImageNetSource
from lightning_sparse_cl.data.loader import SampleTensors
from lightning_sparse_cl.data.open_tasks import OpenTasks, TaskStream, learn
from lightning_sparse_cl.data.series import JapaneseVowelsSource, padded
from lightning_sparse_cl.data.source_tasks import SourceTasks
from lightning_sparse_cl.data.sources import (
    CIFAR10Source,
    CIFAR100Source,
    DigitsSource,
    FashionMNISTSource,
    MNISTSource,
    Source,
)
from lightning_sparse_cl.data.splits import (
    SplitCIFAR10,
    SplitCIFAR100,
    SplitCSV,
    SplitDigits,
    SplitFashionMNIST,
    SplitImageFolder,
    SplitJapaneseVowels,
    SplitMiniImageNet,
    SplitMNIST,
    SplitTensors,
    SplitTextFolder,
    SplitTinyImageNet,
)
from lightning_sparse_cl.data.standardised import Standardisation
from lightning_sparse_cl.data.task_datasets import TaskDatasets
from lightning_sparse_cl.data.tensor_source import TensorSource
from lightning_sparse_cl.data.text import HashTokenizer, TextFolderSource

__all__ = [
    "CIFAR10Source",
    "CIFAR100Source",
    "CSVSource",
    "ClassSplit",
    "DataDescription",
    "DigitsSource",
    "FashionMNISTSource",
    "GrowingImageFolder",
    "HashTokenizer",
    "ImageFolderSource",
    "ImageTransform",
    "JapaneseVowelsSource",
    "MNISTSource",
    "MiniImageNetSource",
    "OpenTasks",
    "Permuted",
    "PermutedDigits",
    "PermutedMNIST",
    "Rotated",
    "RotatedDigits",
    "RotatedMNIST",
    "SampleTensors",
    "Source",
    "SourceTasks",
    "SplitCIFAR10",
    "SplitCIFAR100",
    "SplitCSV",
    "SplitDigits",
    "SplitFashionMNIST",
    "SplitImageFolder",
    "SplitJapaneseVowels",
    "SplitMNIST",
    "SplitMiniImageNet",
    "SplitTensors",
    "SplitTextFolder",
    "SplitTinyImageNet",
    "Standardisation",
    "TaskDataModule",
    "TaskDatasets",
    "TaskStream",
    "Tasks",
    "TensorSource",
    "TextFolderSource",
    "TinyImageNetSource",
    "learn",
    "padded",
]
