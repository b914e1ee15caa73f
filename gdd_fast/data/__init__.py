"""Image data: reading sets from disk, endless batches for training, writing sets in EDM's format."""

from gdd_fast.data.dataset import ArrayDataset, FileDataset, ImageDataset, open_dataset
from gdd_fast.data.demo import demo_dataset, load_data
from gdd_fast.data.stream import BatchStream
from gdd_fast.data.writer import write_edm_zip
