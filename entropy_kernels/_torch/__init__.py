"""The ops in blocks of torch.mm: any device, no compiler."""
