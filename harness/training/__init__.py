"""The recipe of DeepSeek V3.2 at any scale, and the loop that runs it: dense, warm-up, sparse, fine-tuning."""
