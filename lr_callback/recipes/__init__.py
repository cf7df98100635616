"""Real data and small networks to train: what the files in ``configs/`` name by class path."""

from lr_callback.recipes.cifar10 import CIFAR10Data as CIFAR10Data
from lr_callback.recipes.classifier import ImageClassifier as ImageClassifier
from lr_callback.recipes.digits import DigitsData as DigitsData
from lr_callback.recipes.resnet import CifarResNet as CifarResNet
