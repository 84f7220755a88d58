"""The frozen parts of perceptio-tiny, trained on rendered scenes.  Needs the extras `train` and `world`."""
