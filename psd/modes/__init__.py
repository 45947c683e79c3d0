"""What is distilled: the rows of psd.config.MODES name the stages here."""
