package qcow2fsck

import (
	"math/rand/v2"
	"testing"
)

// TestCells holds the cells against plain arrays, in windows as small as they
// get.
func TestCells(t *testing.T) {
	const n = 5 * pageCells
	type cell struct {
		n  uint32
		fl uint8
	}
	kinds := []uint8{usual, fPlain, fPacked, fPlain | fActive | fUncopied}
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 3))
		model := make([]cell, n)
		type op struct {
			first, n int64
			w        uint32
			fl       uint8
		}
		var ops []op
		for range 20 {
			ops = append(ops, op{rng.Int64N(n), 1, 1, fMeta})
		}
		for range 300 {
			first := rng.Int64N(n)
			ops = append(ops, op{first, min(1+rng.Int64N(400), n-first), []uint32{1, 1, 1, 2, 700}[rng.IntN(5)], kinds[rng.IntN(len(kinds))]})
		}
		if seed%2 == 1 { // whole pages in the usual state, some of them with metadata in it
			ops = ops[:20+seed%10]
			for at := int64(0); at < n; at += pageCells / 2 {
				ops = append(ops, op{at, pageCells / 2, 1, usual})
			}
			first := rng.Int64N(n - 2*pageCells)
			ops = append(ops, op{3 * pageCells, pageCells, 1, usual}, op{first, 2 * pageCells, 1, usual}, op{first + 7, 1, 1, fMeta})
		}
		for _, o := range ops {
			for i := o.first; i < o.first+o.n; i++ {
				if model[i].fl&fMeta != 0 && o.fl != fMeta {
					continue
				}
				model[i].n, model[i].fl = join(model[i].n, model[i].fl, o.w, o.fl)
			}
		}
		windows := 0
		for lo := int64(0); ; windows++ {
			c := newCells(lo, n, []int64{1 << 10, 10 << 10, 1 << 30}[seed%3])
			for _, o := range ops {
				for at := o.first; at < o.first+o.n; {
					done := c.add(at, o.first+o.n-at, o.w, o.fl)
					at += done
					if at < o.first+o.n {
						at++ // metadata
					}
				}
			}
			hi := c.hi.Load()
			for i := lo; i < min(hi, n); i++ {
				if k, fl := c.get(i); k != model[i].n || k > 0 && fl != model[i].fl {
					t.Fatalf("seed %d: cell %d is %d %b, want %d %b", seed, i, k, fl, model[i].n, model[i].fl)
				}
			}
			if hi >= n {
				break
			}
			lo = hi
		}
		if seed%3 == 0 && windows < 2 {
			t.Errorf("only %d windows", windows+1)
		}
	}
}
