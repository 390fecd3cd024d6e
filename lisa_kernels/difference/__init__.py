"""What a fine-tuned model has more than its base, as a small adapter that peft loads."""
