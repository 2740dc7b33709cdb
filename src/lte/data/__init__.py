"""Text and tasks as rows of tokens to train and measure on."""
