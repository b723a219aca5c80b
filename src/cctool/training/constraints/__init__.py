"""What training must respect besides its loss: penalties, masks, shared entries, frozen statistics."""
