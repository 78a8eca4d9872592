"""The method: branches, decoder, heads, CASA, losses, EMA, monitors and the trainer."""
