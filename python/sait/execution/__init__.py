"""How a block's result is computed: by its modules as they are, or faster."""
