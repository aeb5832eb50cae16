"""Tests run with the shipped rule: nothing is measured, and no file of the user's is read."""

import os

os.environ["FASTFT_TUNE"] = "0"
