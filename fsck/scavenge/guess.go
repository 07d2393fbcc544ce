package scavenge

// guess places pieces by the order of allocation: images grow at their end, so
// that what lies between two neighbours with a place, and is as much as fits
// between them on the disk, most likely belongs there in this order. Nothing
// proves it.
func (p *pieces) guess() {
	type run struct {
		from int32 // place of the piece before; -1 is the beginning of the disk
		open []int32
	}
	r := run{from: -1}
	settle := func(to int64) {
		defer func() { r.open = r.open[:0] }()
		if len(r.open) == 0 || to-int64(r.from)-1 != int64(len(r.open)) {
			return
		}
		for i := range r.open {
			if p.taken.has(r.from + 1 + int32(i)) {
				return
			}
		}
		for i, piece := range r.open {
			p.put(piece, r.from+1+int32(i), GuessRun, 0)
		}
	}
	for i := range int32(len(p.place)) {
		switch {
		case p.idle.get(int64(i)):
		case p.place[i] < 0:
			r.open = append(r.open, i)
		default:
			settle(int64(p.place[i]))
			r.from = p.place[i]
		}
	}
	if p.units > 0 {
		settle(p.units)
	}
}
