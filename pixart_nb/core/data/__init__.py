"""Captioned pictures: the drawn pixel-art scenes, their captions and the judge that reads them back."""
