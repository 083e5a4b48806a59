"""Ratios against Hugging Face, PEFT and DeepSpeed on the same work, in one run. See README.md."""
