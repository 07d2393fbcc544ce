package scavenge

// bitset is a set of small numbers.
type bitset []uint64

func newBitset(n int64) bitset    { return make(bitset, (n+63)/64) }
func (b bitset) get(i int64) bool { return b[i>>6]>>(i&63)&1 != 0 }
func (b bitset) set(i int64)      { b[i>>6] |= 1 << (i & 63) }
func (b bitset) has(i int64) bool { return i >= 0 && i>>6 < int64(len(b)) && b.get(i) }
func bitsetBytes(n int64) int64   { return (n + 63) / 64 * 8 }

// places is a set of units that have a piece: a bitset where their number is
// known, else a map, for there are few.
type places struct {
	b bitset
	m map[int32]struct{}
}

func (t *places) has(u int32) bool {
	_, ok := t.m[u]
	return ok || t.b.has(int64(u))
}

func (t *places) add(u int32) {
	if int64(u)>>6 < int64(len(t.b)) {
		t.b.set(int64(u))
		return
	}
	t.m[u] = struct{}{}
}

func (t *places) remove(u int32) {
	if int64(u)>>6 < int64(len(t.b)) {
		t.b[u>>6] &^= 1 << (u & 63)
	}
	delete(t.m, u)
}
