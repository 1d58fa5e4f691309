"""CUDA behind the device seam. Imported by name, when a rank runs on a GPU; never from above.

`driver.py` binds libcuda with ctypes: IPC handles of whole allocations, batched copies and events
that another thread can wait for are not in torch. It works in the primary context, torch's own.
"""
