"""Every method that drops tokens, fine-tuned on canvas in the same budget, at the same arithmetic."""
