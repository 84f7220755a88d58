"""Fine-tuning: what `train_sft.py` is built of.  Needs the extra `train`."""
