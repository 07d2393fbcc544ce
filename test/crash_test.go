package e2e

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"golang.org/x/sys/unix"
)

const (
	slotSize  = 4096
	sector    = 512
	crashes   = 20
	crashDisk = 64 << 20
	writers   = 4
)

// slot is a small place of the disk that one writer owns, with the versions
// that may stand there after a crash: the one that was last made durable, and
// what was written since, also before an earlier crash.
type slot struct {
	durable int
	pending []int
}

// ledger is what the writers of one disk know.
type ledger struct {
	slots   [crashDisk / slotSize]slot
	version int // never used twice
}

// content is what version v of slot i holds; version 0 and every seventh are
// zeros.
func content(i, v int) []byte {
	if v%7 == 0 {
		return make([]byte, slotSize)
	}
	return imgtest.PatternBytes(uint64(v), int64(i)*slotSize, slotSize)
}

// load writes to the slots that are w modulo writers, with an fsync after
// every few, until a call fails because the server is gone.
func (l *ledger) load(path string, w int, version func() int, seed uint64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	rng := rand.New(rand.NewPCG(seed, uint64(w)))
	var dirty []int
	for {
		for range 1 + rng.IntN(4) {
			i := rng.IntN(len(l.slots)/writers)*writers + w
			if rng.IntN(2) == 0 {
				i = rng.IntN(64)*writers + w // some places again and again
			}
			v := version()
			l.slots[i].pending = append(l.slots[i].pending, v)
			dirty = append(dirty, i)
			if v%7 == 0 && rng.IntN(2) == 0 {
				err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(i)*slotSize, slotSize)
			} else {
				_, err = f.WriteAt(content(i, v), int64(i)*slotSize)
			}
			if err != nil {
				return err
			}
		}
		if err := f.Sync(); err != nil {
			return err
		}
		for _, i := range dirty {
			if p := l.slots[i].pending; len(p) > 0 {
				l.slots[i].durable = p[len(p)-1]
				l.slots[i].pending = nil
			}
		}
		dirty = dirty[:0]
	}
}

// verify compares a raw copy of the disk with the ledger, sector by sector: a
// write that was not synced may have come through in part.
func (l *ledger) verify(t *testing.T, who, raw string) {
	t.Helper()
	disk, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(disk) != crashDisk {
		t.Fatalf("%s: a disk of %d bytes, want %d", who, len(disk), crashDisk)
	}
	bad := 0
	for i := range l.slots {
		s := &l.slots[i]
		var allowed [][]byte
		for _, v := range append([]int{s.durable}, s.pending...) {
			allowed = append(allowed, content(i, v))
		}
		for at := 0; at < slotSize; at += sector {
			got := disk[i*slotSize+at:][:sector]
			ok := false
			for _, want := range allowed {
				ok = ok || bytes.Equal(got, want[at:at+sector])
			}
			if !ok {
				bad++
				if bad <= 5 {
					t.Errorf("%s: slot %d, byte %d: neither the durable version %d nor one of %v", who, i, at, s.durable, s.pending)
				}
				break
			}
		}
	}
	if bad > 0 {
		t.Fatalf("%s: %d slots lost", who, bad)
	}
}

// TestKillDuringWrites kills the server in the middle of a load that syncs all
// the time. What an fsync reported as durable must be there afterwards, in
// QEMU's eyes and in ours, and the checkers may find leaks at most.
func TestKillDuringWrites(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img")
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			image := f.create(t, workDir(t), crashDisk, true)
			var l ledger
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			synced := 0
			for n := range crashes {
				synced += l.crash(t, f, image, seed+uint64(n)*100)
				if t.Failed() {
					t.Fatalf("crash %d", n)
				}
			}
			if synced == 0 {
				t.Error("nothing was ever made durable: the test shows nothing")
			}
		})
	}
}

// crash runs the load, kills the server, verifies, and returns how many slots
// hold something durable.
func (l *ledger) crash(t *testing.T, f format, image string, seed uint64) int {
	t.Helper()
	m := serveImage(t, image, "-w")
	var mu sync.Mutex
	version := func() int {
		mu.Lock()
		defer mu.Unlock()
		l.version++
		return l.version
	}
	var wg sync.WaitGroup
	var killed atomic.Bool
	for w := range writers {
		wg.Go(func() {
			if err := l.load(m.file(), w, version, seed); !killed.Load() {
				t.Errorf("writer %d ended before the server was killed: %v", w, err)
			}
		})
	}
	time.Sleep(time.Duration(50+seed%250) * time.Millisecond)
	killed.Store(true)
	m.kill()
	wg.Wait()
	// The dead mount is recovered by -u, and only then can be used again.
	if _, err := os.Stat(m.file()); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("the mount of a killed server answers %v, want ENOTCONN", err)
	}
	wantExit(t, 0, "mount-image", "-u", m.dir)
	if left := mountsUnder(m.dir); len(left) > 0 {
		t.Fatalf("mount-image -u left %q", left)
	}

	dir := workDir(t)
	raw := filepath.Join(dir, "qemu.raw")
	imgtest.QemuRaw(t, "", imgtest.Chain(f.chain(t, image)...), raw)
	l.verify(t, "qemu-img", raw)
	f.check(t, image, true)

	m = serveImage(t, image)
	raw = filepath.Join(dir, "ours.raw")
	imgtest.Run(t, "cp", m.file(), raw)
	m.unmount()
	l.verify(t, "mount-image", raw)
	durable := 0
	for i := range l.slots {
		if l.slots[i].durable != 0 {
			durable++
		}
	}
	return durable
}
