package layers

import "sync/atomic"

// touched remembers which compressed clusters were read in part of late, about
// a thousand of them: whoever comes to one a second time is likely to want the
// rest as well, while keeping all of what is read here and there would cost the
// decompression of sixteen times as much as was asked for.
type touched [1024]atomic.Uint64

// again notes that a cluster was read, and reports whether it had been noted
// before. It may have been forgotten meanwhile.
func (t *touched) again(layer uint16, host int64) bool {
	key := uint64(layer)<<48 ^ uint64(host) + 1
	slot := &t[key*0x9e3779b97f4a7c15>>54]
	return slot.Swap(key) == key
}
