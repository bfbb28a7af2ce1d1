"""What a run takes before it is begun: parameters, multiply-adds, memory and time."""
