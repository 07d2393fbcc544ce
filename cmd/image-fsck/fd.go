package main

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// fdProgress writes progress as e2fsck's -C does: lines of pass, done, total
// and name.
type fdProgress struct {
	mu   sync.Mutex
	f    *os.File
	last string
}

func newFDProgress(fd int) (*fdProgress, error) {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		return nil, fmt.Errorf("-C %d: %w", fd, err)
	}
	return &fdProgress{f: os.NewFile(uintptr(fd), fmt.Sprintf("descriptor %d", fd))}, nil
}

// resolution is how many lines a pass has at most: there may be many millions
// of clusters.
const resolution = 1000

func (p *fdProgress) update(pass int, done, total int64, name string) {
	if p == nil || total <= 0 {
		return
	}
	done = max(0, min(done, total))
	if total > resolution {
		done, total = int64(float64(done)/float64(total)*resolution), resolution
	}
	text := fmt.Sprintf("%d %d %d %s\n", pass, done, total, printable(name))
	p.mu.Lock()
	defer p.mu.Unlock()
	if text == p.last {
		return
	}
	p.last = text
	// Nobody may be listening any more; that must not stop a repair.
	_, _ = p.f.WriteString(text)
}

func (p *fdProgress) close() { _ = p.f.Close() }
