// Package uring carries the requests of a FUSE connection over io_uring
// instead of read(2) and write(2) of /dev/fuse (Linux 6.14, where the
// parameter enable_uring of the module fuse is set).
//
// Design note. The kernel has a queue for each processor and puts a request
// into that of the processor on which it was made. Each queue has a ring and a
// thread of its own here, on the same processor unless another serves better
// (affinity). A reply and the wait for the next request are one system call.
//
// What a thread can answer without waiting for anything it answers itself
// (Handler.Try). Everything else goes to a goroutine that belongs to the place
// of the request, so that a request that waits for a disk holds up no other.
// Only the thread of a queue may submit to its ring (the kernel delivers what
// comes next on the thread that asked for it), so a goroutine that is done
// puts its place on a list and wakes the thread through an eventfd.
//
// Rings are made (New) before a server gives up its rights, and can do nothing
// but what this package does with them, whoever has the process.
package uring

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Handler answers requests. Each of its methods is called by several
// goroutines at once.
type Handler interface {
	// Try answers r if it can without holding up those behind it for long,
	// and reports whether it did. It must not touch r otherwise.
	Try(r *Request) bool
	// Do answers r.
	Do(r *Request)
}

// maxProcessors is how many queues are worth their memory.
const maxProcessors = 64

// Transport is a set of rings, one for each processor.
type Transport struct {
	queues []*queue
	done   sync.WaitGroup
}

// Available reports why the kernel does not offer FUSE over io_uring, nil if
// it does.
func Available() error {
	b, err := os.ReadFile("/sys/module/fuse/parameters/enable_uring")
	if err != nil {
		return fmt.Errorf("FUSE over io_uring: %w", err)
	}
	if s := strings.TrimSpace(string(b)); s != "Y" && s != "1" {
		return errors.New("FUSE over io_uring is switched off (/sys/module/fuse/parameters/enable_uring)")
	}
	return nil
}

// New makes the rings, with places for depth requests each, of at most payload
// bytes of data.
func New(depth, payload int) (t *Transport, err error) {
	n, err := processors()
	if err != nil {
		return nil, err
	}
	if n > maxProcessors {
		return nil, fmt.Errorf("FUSE over io_uring with %d processors: %w", n, errors.ErrUnsupported)
	}
	t = &Transport{}
	for i := range n {
		q, err := newQueue(uint16(i), depth, payload)
		if err != nil {
			return nil, errors.Join(err, t.Close())
		}
		t.queues = append(t.queues, q)
	}
	return t, nil
}

// processors counts those that the kernel may ever have, as it counts queues.
func processors() (int, error) {
	const path = "/sys/devices/system/cpu/possible"
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	s := strings.TrimSpace(string(b))
	last := s[strings.LastIndexAny(s, "-,")+1:]
	n, err := strconv.ParseUint(last, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return int(n) + 1, nil
}

// Start serves the connection conn, which has been initialised with the
// capability of this transport, until it ends. The transport takes over conn.
func (t *Transport) Start(conn int, h Handler) error {
	ready := make(chan error, len(t.queues))
	for _, q := range t.queues {
		t.done.Go(func() { q.serve(conn, h, ready) })
	}
	var errs []error
	for range t.queues {
		errs = append(errs, <-ready)
	}
	go func() {
		t.done.Wait()
		_ = unix.Close(conn)
	}()
	return errors.Join(errs...)
}

// Wait returns when every queue has ended, as they do when the connection
// does, or after that long.
func (t *Transport) Wait(most time.Duration) {
	ended := make(chan struct{})
	go func() {
		t.done.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(most):
	}
}

// Close gives back what New has made, for a transport that was not started.
func (t *Transport) Close() error {
	var errs []error
	for _, q := range t.queues {
		errs = append(errs, q.close())
	}
	return errors.Join(errs...)
}
