package backend

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// contents returns the distinct contents of the first file over all states.
func contents(t *testing.T, r *Recorder, o StateOptions) []string {
	t.Helper()
	seen := map[string]bool{}
	for s := range r.States(o) {
		seen[string(s.Files[0].Bytes())] = true
	}
	var out []string
	for c := range seen {
		out = append(out, c)
	}
	slices.Sort(out)
	return out
}

// TestStatesExact: of a small log the states are exactly those that an
// independent enumeration by hand gives.
func TestStatesExact(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, f File)
		o    StateOptions
		want []string
	}{
		{"nothing", func(t *testing.T, f File) {}, StateOptions{}, []string{"base"}},
		{"two writes", func(t *testing.T, f File) {
			write(t, f, []byte("B"), 0)
			write(t, f, []byte("E"), 3)
		}, StateOptions{}, []string{"base", "Base", "basE", "BasE"}},
		{"a sync between", func(t *testing.T, f File) {
			write(t, f, []byte("B"), 0)
			ok(t, f.Sync())
			write(t, f, []byte("E"), 3)
		}, StateOptions{}, []string{"base", "Base", "BasE"}},
		{"the sync is ignored", func(t *testing.T, f File) {
			write(t, f, []byte("B"), 0)
			ok(t, f.Sync())
			write(t, f, []byte("E"), 3)
		}, StateOptions{IgnoreSync: 1}, []string{"base", "Base", "basE", "BasE"}},
		{"order", func(t *testing.T, f File) {
			write(t, f, []byte("1"), 0)
			write(t, f, []byte("2"), 0)
		}, StateOptions{}, []string{"base", "1ase", "2ase"}},
		{"growth and truncate", func(t *testing.T, f File) {
			ok(t, f.Truncate(2))
			write(t, f, []byte("X"), 5)
		}, StateOptions{}, []string{"base", "ba", "base\x00X", "ba\x00\x00\x00X"}},
		{"punch and zero", func(t *testing.T, f File) {
			ok(t, f.PunchHole(0, 1))
			ok(t, f.ZeroRange(3, 1))
		}, StateOptions{}, []string{"base", "\x00ase", "bas\x00", "\x00as\x00"}},
		{"torn", func(t *testing.T, f File) {
			write(t, f, []byte("1234"), 1)
		}, StateOptions{Piece: func(int, int64) int64 { return 2 }},
			[]string{"base", "b1se", "ba23", "b123", "base4", "b1se4", "ba234", "b1234"}},
		{"copy", func(t *testing.T, f File) {
			_, err := f.CopyRange(f, 0, 2, 2)
			ok(t, err)
		}, StateOptions{}, []string{"base", "baba"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := NewRecorder()
			f := must(r.Wrap(NewMemBytes("mem", []byte("base"))))(t)
			c.do(t, f)
			slices.Sort(c.want)
			if got := contents(t, r, c.o); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// TestStatesFailedSync: what was there when a Sync failed is never certain
// again, and still takes effect in the order of the log.
func TestStatesFailedSync(t *testing.T) {
	fault := NewFault(NewMemBytes("mem", []byte("base")))
	r := NewRecorder()
	f := must(r.Wrap(fault))(t)
	write(t, f, []byte("12"), 0)
	fault.Inject(Rule{On: OpSync})
	wantErr(t, f.Sync(), unix.EIO)
	write(t, f, []byte("3"), 1)
	ok(t, f.Sync())
	var last []string
	for s := range r.States(StateOptions{}) {
		if s.Epoch == 2 {
			if s.Completed != 1 {
				t.Errorf("%d completed", s.Completed)
			}
			last = append(last, string(s.Files[0].Bytes()))
		}
	}
	slices.Sort(last)
	if want := []string{"13se", "b3se"}; !slices.Equal(last, want) {
		t.Errorf("got %q, want %q", last, want)
	}
	if r.Syncs() != 1 || r.SyncCalls() != 2 {
		t.Errorf("%d of %d syncs", r.Syncs(), r.SyncCalls())
	}
}

// TestStatesFiles: a Sync makes durable what was done to its own file only.
func TestStatesFiles(t *testing.T) {
	r := NewRecorder()
	a := must(r.Wrap(NewMemBytes("a", []byte("a"))))(t)
	b := must(r.Wrap(NewMemBytes("b", []byte("b"))))(t)
	write(t, a, []byte("A"), 0)
	write(t, b, []byte("B"), 0)
	ok(t, b.Sync())
	ok(t, a.Sync())
	got := map[int][]string{}
	for s := range r.States(StateOptions{}) {
		got[s.Completed] = append(got[s.Completed], string(s.Files[0].Bytes())+string(s.Files[1].Bytes()))
	}
	for _, g := range got {
		slices.Sort(g)
	}
	want := map[int][]string{0: {"AB", "Ab", "aB", "ab"}, 1: {"AB", "aB"}, 2: {"AB"}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestStatesMany: the kinds of subsets of an epoch with many pieces.
func TestStatesMany(t *testing.T) {
	const n = 30
	r := NewRecorder()
	f := must(r.Wrap(NewMem("mem")))(t)
	write(t, f, make([]byte, n*4096+4096), 0)
	ok(t, f.Sync())
	write(t, f, bytes.Repeat([]byte{1}, n*4096), 4096)
	collect := func(o StateOptions) map[string]bool {
		sets := map[string]bool{}
		for s := range r.States(o) {
			if s.Completed != 1 {
				continue
			}
			var set []byte
			b := s.Files[0].Bytes()
			for i := range n {
				set = append(set, '0'+b[(i+1)*4096])
			}
			if sets[string(set)] {
				t.Errorf("%s comes twice", set)
			}
			sets[string(set)] = true
		}
		return sets
	}
	plain := collect(StateOptions{Random: -1})
	if len(plain) != n+1+n+n-1-1 { // "all but the last" and "only the first" are prefixes
		t.Errorf("%d states", len(plain))
	}
	for i := range n + 1 {
		p := bytes.Repeat([]byte("0"), n)
		copy(p, bytes.Repeat([]byte("1"), i))
		if !plain[string(p)] {
			t.Errorf("no prefix %s", p)
		}
		if i < n {
			one, but := bytes.Repeat([]byte("0"), n), bytes.Repeat([]byte("1"), n)
			one[i], but[i] = '1', '0'
			if !plain[string(one)] || !plain[string(but)] {
				t.Errorf("%s or %s is missing", one, but)
			}
		}
	}
	random := collect(StateOptions{Seed: 1})
	if len(random) < len(plain)+150 {
		t.Errorf("only %d states with random ones", len(random))
	}
	if fmt.Sprint(random) != fmt.Sprint(collect(StateOptions{Seed: 1})) {
		t.Error("the same seed gives other states")
	}
	if fmt.Sprint(random) == fmt.Sprint(collect(StateOptions{Seed: 2})) {
		t.Error("another seed gives the same states")
	}
	few := collect(StateOptions{MaxPerEpoch: 20})
	if len(few) < 15 || len(few) > 22 || !few[string(bytes.Repeat([]byte("1"), n))] || !few[string(bytes.Repeat([]byte("0"), n))] {
		t.Errorf("%d bounded states", len(few))
	}
}

// TestStatesOwn: changing a state harms neither the others nor the recording.
func TestStatesOwn(t *testing.T) {
	r := NewRecorder()
	f := must(r.Wrap(NewMemBytes("mem", pattern(9000, 1))))(t)
	write(t, f, []byte("xyz"), 5000)
	before := contents(t, r, StateOptions{})
	for s := range r.States(StateOptions{}) {
		write(t, s.Files[0], bytes.Repeat([]byte("!"), 9000), 0)
		ok(t, s.Files[0].Truncate(10))
	}
	if !slices.Equal(before, contents(t, r, StateOptions{})) {
		t.Error("the states have changed")
	}
	for range r.States(StateOptions{}) {
		break // stopping early must not panic
	}
}

// shadow is a tiny store by shadow paging: two slots of two blocks, and a
// header that names the valid one.
type shadow struct {
	f   File
	seq uint32
}

const slotSize = 8192

func (s *shadow) put(skipSync int) error {
	s.seq++
	slot := int64(4096 + slotSize*(s.seq%2))
	if _, err := s.f.WriteAt(bytes.Repeat([]byte{byte(s.seq)}, slotSize), slot); err != nil {
		return err
	}
	if skipSync != 1 {
		if err := s.f.Sync(); err != nil {
			return err
		}
	}
	var h [12]byte
	binary.LittleEndian.PutUint32(h[0:], s.seq)
	binary.LittleEndian.PutUint32(h[8:], crc32.ChecksumIEEE(h[:8]))
	if _, err := s.f.WriteAt(h[:], 0); err != nil {
		return err
	}
	if skipSync != 2 {
		return s.f.Sync()
	}
	return nil
}

// check reads what put wrote. It returns the sequence number.
func check(f File) (uint32, error) {
	var h [12]byte
	if _, err := f.ReadAt(h[:], 0); err != nil {
		return 0, nil // never written
	}
	seq := binary.LittleEndian.Uint32(h[0:])
	if seq == 0 {
		return 0, nil
	}
	if crc32.ChecksumIEEE(h[:8]) != binary.LittleEndian.Uint32(h[8:]) {
		return 0, fmt.Errorf("torn header")
	}
	p := make([]byte, slotSize)
	if _, err := f.ReadAt(p, int64(4096+slotSize*(seq%2))); err != nil {
		return 0, err
	}
	if !bytes.Equal(p, bytes.Repeat([]byte{byte(seq)}, slotSize)) {
		return 0, fmt.Errorf("slot of %d holds something else", seq)
	}
	return seq, nil
}

// verdict runs put four times and judges all states.
func verdict(t *testing.T, o StateOptions, skip int, over File) (states, syncs int, bad error) {
	t.Helper()
	r := NewRecorder()
	s := shadow{f: must(r.Wrap(over))(t)}
	begun, done := []int{0}, []int{0} // Syncs before and after put i
	for range 4 {
		begun = append(begun, r.Syncs())
		ok(t, s.put(skip))
		done = append(done, r.Syncs())
	}
	for st := range r.States(o) {
		states++
		seq, err := check(st.Files[0])
		if err == nil {
			for i := range begun {
				if done[i] <= st.Completed && int(seq) < i {
					err = fmt.Errorf("%d was acknowledged, found %d", i, seq)
				}
				if begun[i] > st.Completed && int(seq) >= i {
					err = fmt.Errorf("%d was not begun, found %d", i, seq)
				}
			}
		}
		if err != nil && bad == nil {
			bad = fmt.Errorf("%s: %w", st, err)
		}
	}
	return states, r.SyncCalls(), bad
}

// TestNegativeControl: the right protocol survives every state; without any
// one of its syncs the states show the damage.
func TestNegativeControl(t *testing.T) {
	states, syncs, bad := verdict(t, StateOptions{}, 0, NewMem("mem"))
	if bad != nil || syncs != 8 || states != 4*(4+2)+1 {
		t.Fatalf("%d states, %d syncs, %v", states, syncs, bad)
	}
	for n := 1; n <= syncs; n++ {
		if _, _, bad := verdict(t, StateOptions{IgnoreSync: n}, 0, NewMem("mem")); bad == nil {
			t.Errorf("sync %d ignored, and nobody noticed", n)
		}
	}
	for skip := 1; skip <= 2; skip++ {
		if _, _, bad := verdict(t, StateOptions{}, skip, NewMem("mem")); bad == nil {
			t.Errorf("sync %d of each put left out, and nobody noticed", skip)
		}
	}
	if _, _, bad := verdict(t, StateOptions{}, 0, openTemp(t, t.TempDir(), Options{})); bad != nil {
		t.Errorf("over a file of the system: %v", bad)
	}
}

// TestStatesShortWrite: of a write that failed, what was written counts.
func TestStatesShortWrite(t *testing.T) {
	fault := NewFault(NewMemBytes("mem", []byte("base")))
	r := NewRecorder()
	f := must(r.Wrap(fault))(t)
	fault.Inject(Rule{On: OpWrite, Short: 2, Sticky: true, Err: unix.ENOSPC})
	_, err := f.WriteAt([]byte("1234"), 0)
	wantErr(t, err, unix.ENOSPC)
	if got, want := contents(t, r, StateOptions{}), []string{"12se", "base"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	_, err = f.WritevAt([][]byte{[]byte("5"), []byte("678")}, 2)
	wantErr(t, err, unix.ENOSPC)
	if got, want := contents(t, r, StateOptions{}), []string{"1256", "12se", "ba56", "base"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
