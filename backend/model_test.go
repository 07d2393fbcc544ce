package backend

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// modelMax bounds the length of the file in the model test.
const modelMax = 70000

// modelTime bounds what one implementation may take before the rounds that are
// left are passed over.
const modelTime = 1500 * time.Millisecond

// TestModel does random operations on a file and on a byte array.
func TestModel(t *testing.T) {
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) {
			f := im.make(t)
			start := time.Now()
			rapid.Check(t, func(rt *rapid.T) {
				if time.Since(start) > modelTime {
					return // a slow disk; the rounds before have to do
				}
				ok(rt, f.Truncate(0))
				m := &model{f: f, tmpfs: im.name == "tmpfs"}
				rt.Repeat(map[string]func(*rapid.T){
					"write": m.write, "writev": m.writev, "truncate": m.truncate,
					"punch": m.punch, "zero": m.zero, "copy": m.copy, "sync": m.sync,
					"seek": m.seek, "": m.check,
				})
			})
		})
	}
}

type model struct {
	f     File
	want  []byte
	tmpfs bool
}

// position draws offsets that are often on or beside a block boundary.
func position(t *rapid.T, name string, end int) int {
	if end > 600 && rapid.Bool().Draw(t, name+" near") {
		unit := rapid.SampledFrom([]int{512, 4096}).Draw(t, name+" unit")
		p := rapid.IntRange(0, end/unit).Draw(t, name+" block")*unit + rapid.IntRange(-1, 1).Draw(t, name+" beside")
		return min(max(p, 0), end)
	}
	return rapid.IntRange(0, end).Draw(t, name)
}

func (m *model) span(t *rapid.T, end int) (off, n int) {
	a, b := position(t, "from", end), position(t, "to", end)
	return min(a, b), max(a, b) - min(a, b)
}

func (m *model) grow(size int) {
	if size > len(m.want) {
		m.want = append(m.want, make([]byte, size-len(m.want))...)
	}
}

func (m *model) write(t *rapid.T) {
	off, n := m.span(t, modelMax)
	p := pattern(n, rapid.Byte().Draw(t, "seed"))
	write(t, m.f, p, int64(off))
	if n > 0 {
		m.grow(off + n)
		copy(m.want[off:], p)
	}
}

func (m *model) writev(t *rapid.T) {
	off, n := m.span(t, modelMax)
	p := pattern(n, rapid.Byte().Draw(t, "seed"))
	var bufs [][]byte
	for rest := p; ; {
		c := rapid.IntRange(0, len(rest)).Draw(t, "cut")
		bufs = append(bufs, rest[:c])
		if rest = rest[c:]; len(bufs) == 5 {
			bufs = append(bufs, rest)
			break
		}
	}
	if w, err := m.f.WritevAt(bufs, int64(off)); w != n || err != nil {
		t.Fatalf("WritevAt: %d of %d, %v", w, n, err)
	}
	if n > 0 {
		m.grow(off + n)
		copy(m.want[off:], p)
	}
}

func (m *model) truncate(t *rapid.T) {
	size := position(t, "size", modelMax)
	ok(t, m.f.Truncate(int64(size)))
	m.grow(size)
	m.want = m.want[:size:size] // so that growing brings zeros
}

func (m *model) punch(t *rapid.T) {
	off, n := m.span(t, modelMax)
	ok(t, m.f.PunchHole(int64(off), int64(n)))
	if off < len(m.want) {
		clear(m.want[off:min(off+n, len(m.want))])
	}
}

func (m *model) zero(t *rapid.T) {
	off, n := m.span(t, len(m.want))
	if err := m.f.ZeroRange(int64(off), int64(n)); err != nil {
		if !m.tmpfs || !errors.Is(err, errors.ErrUnsupported) {
			t.Fatal(err)
		}
		return
	}
	clear(m.want[off : off+n])
}

func (m *model) copy(t *rapid.T) {
	off, n := m.span(t, len(m.want))
	to := position(t, "target", modelMax)
	if n > 0 && overlap(int64(off), int64(to), int64(n)) {
		return
	}
	if c, err := m.f.CopyRange(m.f, int64(off), int64(to), int64(n)); c != int64(n) || err != nil {
		t.Fatalf("CopyRange: %d of %d, %v", c, n, err)
	}
	if n > 0 {
		m.grow(to + n)
		copy(m.want[to:], m.want[off:off+n])
	}
}

func (m *model) sync(t *rapid.T) { ok(t, m.f.Sync()) }

// seek checks what must hold whatever the grain: between a hole and the next
// data all bytes are zeros.
func (m *model) seek(t *rapid.T) {
	off := position(t, "offset", modelMax)
	hole, err := m.f.SeekHole(int64(off))
	if off >= len(m.want) {
		if err != io.EOF {
			t.Fatalf("SeekHole(%d): %d, %v", off, hole, err)
		}
		return
	}
	ok(t, err)
	if hole < int64(off) || hole > int64(len(m.want)) {
		t.Fatalf("SeekHole(%d): %d", off, hole)
	}
	data, err := m.f.SeekData(int64(off))
	if err == io.EOF {
		data = int64(len(m.want))
	} else {
		ok(t, err)
	}
	if data < int64(off) || !IsZero(m.want[off:data]) {
		t.Fatalf("SeekData(%d) = %d passes bytes that are not zero", off, data)
	}
}

func (m *model) check(t *rapid.T) {
	same(t, content(t, m.f), m.want)
	off, n := m.span(t, modelMax)
	a := make([]byte, n/3)
	b := make([]byte, n-n/3)
	r, err := m.f.ReadvAt([][]byte{a, b}, int64(off))
	end := min(off+n, max(len(m.want), off))
	if r != end-off || err != nil && err != io.EOF || r < n && err != io.EOF {
		t.Fatalf("ReadvAt(%d, %d): %d, %v", off, n, r, err)
	}
	if r > 0 && !bytes.Equal(append(a, b...)[:r], m.want[off:end]) {
		t.Fatalf("ReadvAt(%d, %d) differs", off, n)
	}
}

// TestMemClone: clones share pages and never see each other's changes; equal
// content has the equal hash, holes or not.
func TestMemClone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type pair struct {
			m    *Mem
			want []byte
		}
		all := []*pair{{m: NewMem("mem")}}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			p := all[rapid.IntRange(0, len(all)-1).Draw(t, "which")]
			mo := &model{f: p.m, want: p.want}
			switch rapid.IntRange(0, 4).Draw(t, "op") {
			case 0:
				mo.write(t)
			case 1:
				mo.punch(t)
			case 2:
				mo.truncate(t)
			case 3:
				mo.zero(t)
			case 4:
				all = append(all, &pair{m: p.m.Clone(), want: bytes.Clone(p.want)})
			}
			p.want = mo.want
			for _, q := range all {
				same(t, q.m.Bytes(), q.want)
				fresh := NewMemBytes("fresh", q.want)
				if q.m.Hash() != fresh.Hash() {
					t.Fatal("the same bytes, another hash")
				}
				if n := must(q.m.Allocated())(t); n != q.m.count()*MemPage {
					t.Fatalf("allocated %d", n)
				}
			}
			for _, q := range all[1:] {
				if bytes.Equal(q.want, all[0].want) != (q.m.Hash() == all[0].m.Hash()) {
					t.Fatal("hash and content disagree")
				}
			}
		}
	})
}

// count counts the pages one by one.
func (m *Mem) count() (n int64) {
	for _, c := range m.chunks {
		for _, p := range c.pages {
			if p != nil {
				n++
			}
		}
	}
	return n
}
