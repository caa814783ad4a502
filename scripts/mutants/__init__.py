"""Small wrong changes to the code, one at a time: does a test fail?"""
