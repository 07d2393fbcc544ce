package rewrite_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/rewrite"
)

// scribbled is a small image with random content.
func scribbled(t testing.TB, o qcow2.CreateOptions, seed uint64) *backend.Mem {
	t.Helper()
	ctx := t.Context()
	m := backend.NewMem("image")
	d := &disk{file: m}
	err := qcow2.Create(ctx, m, o)
	if err == nil {
		s, e := d.open(ctx, true, "", 1<<20)
		if err = e; err == nil {
			err = errors.Join(scribble(ctx, s, rand.New(rand.NewPCG(seed, 9)), 60), s.Close())
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestFaults lets every operation on the file fail in turn. The content stays,
// the checker finds leaks at most, and a second run ends as if nothing had
// happened.
func TestFaults(t *testing.T) {
	ctx := t.Context()
	rules := []struct {
		name string
		on   backend.Op
		rule backend.Rule
	}{
		{"EIO on read", backend.OpRead, backend.Rule{Err: syscall.EIO}},
		{"EIO on write", backend.OpWrite, backend.Rule{Err: syscall.EIO}},
		{"ENOSPC after a part", backend.OpWrite, backend.Rule{Err: syscall.ENOSPC, Short: 700}},
		{"EIO on sync", backend.OpSync, backend.Rule{Err: syscall.EIO}},
		{"a sync that loses", backend.OpSync, backend.Rule{Err: syscall.EIO, DropUnsynced: true}},
		{"a full disk", backend.OpWrite | backend.OpTruncate | backend.OpCopy, backend.Rule{Err: syscall.ENOSPC, Sticky: true}},
		{"EIO on truncate", backend.OpTruncate, backend.Rule{Err: syscall.EIO}},
		{"EIO on punch", backend.OpPunch, backend.Rule{Err: syscall.EIO}},
		{"EIO on copy", backend.OpCopy, backend.Rule{Err: syscall.EIO}},
	}
	for _, o := range []qcow2.CreateOptions{
		{Size: 256 << 10, ClusterSize: 512, RefcountBits: 64},
		{Size: 512 << 10, ClusterSize: 4096},
	} {
		base := scribbled(t, o, 3)
		want, err := (&disk{file: base.Clone()}).content(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		clean := &disk{file: base.Clone()}
		opts := rewrite.Options{MaxExtra: 16 << 10}
		if _, err := clean.compact(ctx, opts, 0); err != nil {
			t.Fatal(err)
		}
		size, _ := clean.file.Size()
		for _, r := range rules {
			failed := 0
			for n := 1; ; n++ {
				m := base.Clone()
				f := backend.NewFault(m)
				rule := r.rule
				rule.On, rule.Nth = r.on, n
				f.Inject(rule)
				d := &disk{file: f}
				_, err := d.compact(ctx, opts, 0)
				if f.Fired() == 0 {
					if err != nil {
						t.Fatalf("%s: %v", r.name, err)
					}
					break
				}
				if err != nil {
					failed++
				}
				name := fmt.Sprintf("cluster %d: %s, number %d (%v)", o.ClusterSize, r.name, n, err)
				if err := survives(ctx, &disk{file: m}, want, size, opts); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			t.Logf("cluster %d: %s: %d failed", o.ClusterSize, r.name, failed)
		}
	}
}

// survives checks what an interrupted run has left, and runs again.
func survives(ctx context.Context, d *disk, want []byte, size int64, o rewrite.Options) error {
	got, err := d.content(ctx, "")
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("the content has changed")
	}
	if err := d.check(ctx, fsck.Leak); err != nil {
		return err
	}
	if _, err := d.compact(ctx, o, 0); err != nil {
		return fmt.Errorf("again: %w", err)
	}
	if got, err = d.content(ctx, ""); err != nil || !bytes.Equal(got, want) {
		return errors.Join(errors.New("the content has changed in the second run"), err)
	}
	if err := d.check(ctx, fsck.Note); err != nil {
		return fmt.Errorf("after the second run: %w", err)
	}
	if now, _ := d.file.Size(); now > size {
		return fmt.Errorf("%d bytes after the second run, %d without a fault", now, size)
	}
	return nil
}

// TestCancel stops a run at each batch.
func TestCancel(t *testing.T) {
	base := scribbled(t, qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 4096}, 5)
	want, err := (&disk{file: base.Clone()}).content(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; ; n++ {
		ctx, cancel := context.WithCancel(t.Context())
		d := &disk{file: base.Clone()}
		calls := 0
		o := rewrite.Options{MaxExtra: 8 << 10}
		stop := o
		stop.Progress = func(rewrite.Progress) {
			if calls++; calls == n {
				cancel()
			}
		}
		_, err := d.compact(ctx, stop, 0)
		cancel()
		if calls < n {
			if n < 8 {
				t.Errorf("only %d moments to stop at", n)
			}
			return
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if err := survives(t.Context(), d, want, 1<<30, o); err != nil {
			t.Fatalf("stopped at %d: %v", n, err)
		}
	}
}
