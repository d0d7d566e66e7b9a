"""Online selection inside other people's training loops."""
