"""Measures of image quality: distances between sets of images in the features of a network, and scores of single images.

`features` and `classifier` turn images into features, `distances` compares features, `intervals`
says how certain the comparison is, and `perceptual` scores images without a reference.
"""

from paper_repro.quality.classifier import Classifier as Classifier
from paper_repro.quality.distances import Statistics as Statistics
from paper_repro.quality.distances import frechet as frechet
from paper_repro.quality.distances import kid as kid
from paper_repro.quality.distances import squared_mmd as squared_mmd
from paper_repro.quality.features import Features as Features
from paper_repro.quality.features import Inception as Inception
from paper_repro.quality.features import reference_statistics as reference_statistics
from paper_repro.quality.intervals import Interval as Interval
from paper_repro.quality.intervals import bootstrap as bootstrap
from paper_repro.quality.intervals import difference as difference
from paper_repro.quality.perceptual import brisque as brisque
from paper_repro.quality.perceptual import clip_iqa as clip_iqa
