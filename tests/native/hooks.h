#pragma once

// Counts what is allocated from now on, or no longer.
void count_allocations(bool on);
unsigned long allocations();
