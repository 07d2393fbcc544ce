package layers

import "sync/atomic"

// touched remembers which compressed clusters were read in part of late: whoever
// comes to one a second time is likely to want the rest as well, while to keep
// whole what is read here and there is to decompress and to forget many times
// as much as was asked for.
type touched []atomic.Uint64

// newTouched remembers about as many clusters as a cache of budget bytes holds.
func newTouched(budget, cluster int64) touched {
	n := 1024
	for int64(n) < 2*budget/cluster && n < 1<<16 {
		n *= 2
	}
	return make(touched, n)
}

// again notes that a cluster was read, and reports whether it had been noted
// before. It may have been forgotten meanwhile.
func (t touched) again(layer uint16, host int64) bool {
	key := uint64(layer)<<48 ^ uint64(host) + 1
	slot := &t[key*0x9e3779b97f4a7c15>>32&uint64(len(t)-1)]
	return slot.Swap(key) == key
}
