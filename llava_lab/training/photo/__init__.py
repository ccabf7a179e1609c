"""The recipe of `photo`: a pretrained net that saw photographs, a pretrained language model, a connector trained between them."""
