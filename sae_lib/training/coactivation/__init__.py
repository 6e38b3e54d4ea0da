"""Which latents fire together: options (`rule`), plain matrices (`dense`), the form that scales (`packed`), counts."""
