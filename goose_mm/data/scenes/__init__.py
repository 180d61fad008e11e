"""The sticker builder: scenes of drawings, questions about them, garment photos."""
