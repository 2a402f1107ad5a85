"""Deployment packages of runs, and predictions for images without labels.

path = package("runs/mine-seed0", "packages", int8=True)     # packages/mine_1.0.0.tar
check(path)                                                  # of a package from elsewhere
predict(path, ["photos", "more.txt"])                        # a data frame
"""

from workbench.export.archive import ExportError, PackageError, read_flips, read_report
from workbench.export.inputs import PredictionError
from workbench.export.metadata import preprocess
from workbench.export.onnx import Network, session, to_int8, to_onnx
from workbench.export.packaging import default_name, newest, package, trained_model
from workbench.export.parity import table
from workbench.export.prediction import open_source, predict, predict_image, predict_to_file
from workbench.export.verify import check, load, measure
