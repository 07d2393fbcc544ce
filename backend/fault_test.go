package backend

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// script does one operation of every class and returns the first error.
func script(f File) error {
	p := make([]byte, 100)
	for _, op := range []func() error{
		func() error { _, err := f.WriteAt(pattern(5000, 1), 0); return err },
		func() error { _, err := f.WritevAt([][]byte{pattern(50, 2), pattern(60, 3)}, 5000); return err },
		func() error { return f.Sync() },
		func() error { _, err := f.ReadAt(p, 10); return err },
		func() error { _, err := f.ReadvAt([][]byte{p[:10], p[10:]}, 10); return err },
		func() error { return f.Truncate(9000) },
		func() error { return f.PunchHole(100, 200) },
		func() error { return f.ZeroRange(400, 200) },
		func() error { _, err := f.CopyRange(f, 0, 6000, 2000); return err },
		func() error { _, err := f.Size(); return err },
		func() error { _, err := f.Allocated(); return err },
		func() error { _, err := f.SeekData(0); return err },
		func() error { _, err := f.SeekHole(0); return err },
		func() error { return f.Sync() },
	} {
		if err := op(); err != nil {
			return err
		}
	}
	return nil
}

// TestFaultEvery fails every operation of a run once.
func TestFaultEvery(t *testing.T) {
	dry := NewFault(NewMem("mem"))
	ok(t, script(dry))
	n := dry.Count(OpAny)
	if n != 14 {
		t.Fatalf("%d operations counted, want 14", n)
	}
	for on, want := range map[Op]int{OpRead: 2, OpWrite: 2, OpSync: 2, OpTruncate: 1, OpPunch: 1, OpZero: 1,
		OpCopy: 1, OpQuery: 4, OpChange: 6} {
		if got := dry.Count(on); got != want {
			t.Errorf("class %b: %d, want %d", on, got, want)
		}
		for i := 1; i <= want+1; i++ {
			f := NewFault(NewMem("mem"))
			f.Inject(Rule{On: on, Nth: i, Err: unix.ENOSPC})
			err := script(f)
			if i > want {
				ok(t, err)
				continue
			}
			wantErr(t, err, unix.ENOSPC)
			if f.Count(on) != i || f.Fired() != 1 {
				t.Errorf("class %b: failed at %d (%d times), want %d", on, f.Count(on), f.Fired(), i)
			}
			ok(t, script(f)) // one shot
		}
	}
	for i := 1; i <= n; i++ {
		f := NewFault(NewMem("mem"))
		f.Inject(Rule{On: OpAny, Nth: i, Sticky: true})
		wantErr(t, script(f), unix.EIO)
		if f.Count(OpAny) != i {
			t.Errorf("failed at %d, want %d", f.Count(OpAny), i)
		}
		wantErr(t, script(f), unix.EIO)
		f.Clear()
		ok(t, script(f))
	}
}

// TestFaultNoEffect: what fails without Short changes nothing.
func TestFaultNoEffect(t *testing.T) {
	want := pattern(10000, 1)
	m := NewMemBytes("mem", want)
	f := NewFault(m)
	f.Inject(Rule{On: OpAny, Sticky: true})
	_, e1 := f.WriteAt([]byte("x"), 0)
	_, e2 := f.WritevAt([][]byte{[]byte("x"), []byte("y")}, 20000)
	_, e3 := f.CopyRange(f, 0, 5000, 100)
	for _, err := range []error{e1, e2, e3, f.Truncate(5), f.PunchHole(0, 100), f.ZeroRange(0, 100)} {
		wantErr(t, err, unix.EIO)
	}
	if f.Fired() != 6 {
		t.Errorf("%d failed", f.Fired())
	}
	same(t, m.Bytes(), want)
}

func TestFaultShort(t *testing.T) {
	want := pattern(10000, 1)
	m := NewMemBytes("mem", want)
	f := NewFault(m)
	short := func(err error) {
		f.Clear()
		f.Inject(Rule{On: OpAny, Short: 7, Err: err})
	}
	p := make([]byte, 20)
	check := func(n int, err error) {
		t.Helper()
		if n != 7 || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%d, %v", n, err)
		}
		same(t, m.Bytes(), want)
	}
	short(unix.ENOSPC)
	n, err := f.WriteAt([]byte("0123456789"), 100)
	copy(want[100:], "0123456")
	check(n, err)
	short(unix.ENOSPC)
	n, err = f.WritevAt([][]byte{[]byte("01234"), []byte("56789")}, 200)
	copy(want[200:], "0123456")
	check(n, err)
	short(unix.ENOSPC)
	n64, err := f.CopyRange(f, 300, 400, 50)
	copy(want[400:407], want[300:])
	check(int(n64), err)
	short(unix.ENOSPC)
	n, err = f.ReadAt(p, 300)
	check(n, err)
	short(unix.ENOSPC)
	n, err = f.ReadvAt([][]byte{p[:3], p[3:]}, 300)
	check(n, err)
	if !bytes.Equal(p[:7], want[300:307]) {
		t.Error("a short read brought other bytes")
	}
}

// TestFaultDrop: a failing Sync loses exactly what was not synced.
func TestFaultDrop(t *testing.T) {
	for _, im := range implementations() {
		if im.name != "os" && im.name != "tmpfs" && im.name != "mem" {
			continue
		}
		t.Run(im.name, func(t *testing.T) {
			inner := im.make(t)
			rapid.Check(t, func(rt *rapid.T) {
				ok(rt, inner.Truncate(0))
				f := NewFault(inner)
				f.Inject(Rule{On: OpSync, Nth: rapid.IntRange(1, 3).Draw(rt, "nth"), DropUnsynced: true})
				m := &model{f: f, tmpfs: im.name == "tmpfs"}
				var durable []byte
				for range rapid.IntRange(1, 20).Draw(rt, "steps") {
					switch rapid.IntRange(0, 6).Draw(rt, "op") {
					case 0:
						m.write(rt)
					case 1:
						m.writev(rt)
					case 2:
						m.truncate(rt)
					case 3:
						m.punch(rt)
					case 4:
						m.zero(rt)
					case 5:
						m.copy(rt)
					case 6:
						if err := f.Sync(); err != nil {
							wantErr(rt, err, unix.EIO)
							m.want = bytes.Clone(durable)
						} else {
							durable = bytes.Clone(m.want)
						}
					}
					same(rt, content(rt, f), m.want)
				}
			})
		})
	}
}

func TestFaultLooksThrough(t *testing.T) {
	inner := openTemp(t, t.TempDir(), Options{})
	w := must(NewRecorder().Wrap(NewFault(inner)))(t)
	_, want, _ := IDOf(inner)
	if _, got, has := IDOf(w); got != want || !has {
		t.Errorf("identity %d, want %d", got, want)
	}
	if LockerOf(w) != inner.(Locker) {
		t.Error("the lock of the file below is not found")
	}
	if w.Name() != inner.Name() {
		t.Error(w.Name())
	}
}
