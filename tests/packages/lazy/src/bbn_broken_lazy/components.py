import bbn_broken_needs_this

Lazy = bbn_broken_needs_this.Defense
