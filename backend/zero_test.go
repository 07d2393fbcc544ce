package backend

import "testing"

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, 2, 7, 8, 9, 63, 64, 65, 511, 4096, 4097} {
		p := make([]byte, n)
		if !IsZero(p) {
			t.Errorf("%d zeros are none", n)
		}
		for i := range p {
			p[i] = 1 << (i % 8)
			if IsZero(p) {
				t.Errorf("%d bytes: byte %d is overlooked", n, i)
			}
			p[i] = 0
		}
	}
	if p := make([]byte, 1<<20); testing.AllocsPerRun(10, func() { IsZero(p) }) != 0 {
		t.Error("it allocates")
	}
}

func BenchmarkIsZero(b *testing.B) {
	p := make([]byte, 64<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		IsZero(p)
	}
}
