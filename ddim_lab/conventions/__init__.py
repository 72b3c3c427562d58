"""What a Fréchet distance depends on beside the images: the field's conventions, changed one at a time."""
