"""What training must respect apart from its loss: penalties, masks, shared entries."""
