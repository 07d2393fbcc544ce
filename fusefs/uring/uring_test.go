package uring

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// TestRestricted: through a ring that was made here no file can be opened,
// read or written.
func TestRestricted(t *testing.T) {
	imgtest.RequireURing(t)
	const opNop, opRead, opOpenAt, opSocket = 0, 22, 18, 45
	for _, op := range []byte{opNop, opRead, opOpenAt, opSocket} {
		r, err := newRing(4)
		if err != nil {
			t.Fatal(err)
		}
		s, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		s.op(op, 0, 1)
		if err := r.submit(); !errors.Is(err, unix.EACCES) {
			t.Errorf("operation %d: %v, want %v", op, err, unix.EACCES)
		}
		if err := r.close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRingFull: more submissions than there is room for are an error.
func TestRingFull(t *testing.T) {
	imgtest.RequireURing(t)
	r, err := newRing(4)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	for range 4 {
		if _, err := r.next(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.next(); err == nil {
		t.Error("a fifth submission of four")
	}
}

// TestNoFUSE: a connection that is none is an error at the start, and leaves
// nothing.
func TestNoFUSE(t *testing.T) {
	imgtest.RequireURing(t)
	tr, err := New(2, 8192)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open("/dev/zero", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.Start(fd, nil); err == nil {
		t.Error("served /dev/zero")
	}
	tr.Wait(0)
}

// TestRequest: what is decoded stays inside the buffers, whatever the numbers.
func TestRequest(t *testing.T) {
	r := NewRequest(16, 2, 512, 4096, 8192)
	if r.Opcode() != 16 || r.Node() != 2 || len(r.Arguments()) != 4096 || r.OpLen() != 40 {
		t.Fatalf("%d %d %d %d", r.Opcode(), r.Node(), len(r.Arguments()), r.OpLen())
	}
	for i := range r.header {
		r.header[i] = 0xff
	}
	if len(r.Arguments()) != 8192 || r.OpLen() < 0 || r.OpLen() > opSize {
		t.Errorf("arguments %d, operation %d", len(r.Arguments()), r.OpLen())
	}
}
