package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// place is where one request at a time of a queue is.
type place struct {
	Request
	iov  []byte // of the header and the payload, for the kernel
	wake chan struct{}
	huge bool // huge pages were asked for
}

// queue is that of one processor.
type queue struct {
	number uint16
	ring   *ring
	event  int // eventfd: something is on the list
	memory []byte
	data   []byte // the payloads, part of memory
	places []place

	mu   sync.Mutex
	list []int // places that were answered by their goroutines
	took []int // the list that the thread works on
}

const page = 4096

// someRequests are counted before the clock is read.
const someRequests = 8

// turn is how long the thread of a queue keeps Go's scheduler waiting. To the
// scheduler a goroutine that goes from one system call to the next without ever
// giving way is one that runs for too long: after 10 ms (forcePreemptNS of the
// runtime) its monitor thread wakes up every 20 µs to take the processor away
// in each of these calls, and wakes other threads for it.
const turn = 4 * time.Millisecond

// wakeUp is the user data of the wait for the eventfd.
const wakeUp = ^uint64(0)

func newQueue(number uint16, depth, payload int) (q *queue, err error) {
	q = &queue{number: number, event: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, q.close())
		}
	}()
	if q.ring, err = newRing(uint32(depth) + 1); err != nil {
		return q, err
	}
	if q.event, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return q, fmt.Errorf("eventfd: %w", err)
	}
	// Not of the garbage collector: the kernel knows the addresses. What is
	// never used costs nothing.
	payload = (payload + page - 1) / page * page
	q.memory, err = unix.Mmap(-1, 0, depth*(page+payload)+hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return q, err
	}
	rest := aligned(q.memory, hugePage)
	q.data, rest = rest[:depth*payload], rest[depth*payload:]
	q.places = make([]place, depth)
	for i := range q.places {
		p, m := &q.places[i], rest[i*page:][:page]
		p.header, p.iov, p.payload = m[:headerSize:headerSize], m[page-32:], q.data[i*payload:(i+1)*payload:(i+1)*payload]
		p.wake = make(chan struct{}, 1)
		putAddress(p.iov, p.header)
		putAddress(p.iov[16:], p.payload)
	}
	q.list, q.took = make([]int, 0, depth), make([]int, 0, depth)
	return q, nil
}

func (q *queue) close() error {
	var errs []error
	if q.ring != nil {
		errs = append(errs, q.ring.close())
	}
	if q.event >= 0 {
		errs = append(errs, unix.Close(q.event))
	}
	if q.memory != nil {
		errs = append(errs, unix.Munmap(q.memory))
	}
	return errors.Join(errs...)
}

// serve is the thread of the queue. It tells ready when its places are known
// to the kernel, and returns when the kernel has taken back all of them.
func (q *queue) serve(conn int, h Handler, ready chan<- error) {
	where := pin(int(q.number))
	var busy sync.WaitGroup
	for i := range q.places {
		busy.Go(func() { q.work(i, h) })
	}
	err := q.offer(conn)
	ready <- err
	if err == nil {
		q.loop(conn, h, where)
	}
	for i := range q.places {
		close(q.places[i].wake)
	}
	busy.Wait()
	_ = q.close() // nobody is left to tell
}

// offer registers the places.
func (q *queue) offer(conn int) error {
	for i := range q.places {
		s, err := q.ring.next()
		if err != nil {
			return err
		}
		s.command(cmdRegister, conn, q.number, 0, uint64(i))
		s.setAddress(q.places[i].iov, 2)
	}
	if err := q.await(); err != nil {
		return err
	}
	if err := q.ring.submit(); err != nil {
		return fmt.Errorf("FUSE over io_uring: %w", err)
	}
	return nil
}

// await asks to be told when something is on the list.
func (q *queue) await() error {
	s, err := q.ring.next()
	if err != nil {
		return err
	}
	s.op(opPollAdd, q.event, wakeUp)
	s.poll(unix.POLLIN, pollAddMult)
	return nil
}

// loop takes requests until there are no places left.
func (q *queue) loop(conn int, h Handler, where *affinity) {
	var drain [8]byte
	start := time.Now()
	taken := 0
	var yielded time.Duration
	for left := len(q.places); left > 0; {
		if q.ring.wait() != nil {
			return // the ring itself is broken; the kernel ends the connection with the process
		}
		for {
			data, result, flags, ok := q.ring.completion()
			if !ok {
				break
			}
			if data == wakeUp {
				_, _ = unix.Read(q.event, drain[:]) // to be told again
				if flags&cqeMore == 0 && q.await() != nil {
					return
				}
				continue
			}
			taken++
			switch p := &q.places[data]; {
			case result < 0:
				left-- // the connection has ended
			case h.Try(&p.Request):
				if q.answer(conn, int(data)) != nil {
					return
				}
			default:
				p.wake <- struct{}{}
			}
		}
		q.mu.Lock()
		q.list, q.took = q.took[:0], q.list
		q.mu.Unlock()
		for _, i := range q.took {
			if q.answer(conn, i) != nil {
				return
			}
		}
		if taken >= someRequests {
			now := time.Since(start)
			where.note(taken, now)
			taken = 0
			if now-yielded > turn {
				yielded = now
				_ = q.ring.submit() // nobody waits for a reply meanwhile; what it did not take is taken by wait
				runtime.Gosched()
			}
		}
	}
}

// answer hands over the reply of a place and asks for its next request.
func (q *queue) answer(conn, i int) error {
	s, err := q.ring.next()
	if err == nil {
		s.command(cmdCommit, conn, q.number, q.places[i].commit(), uint64(i))
	}
	return err
}

// work is the goroutine of a place.
func (q *queue) work(i int, h Handler) {
	p := &q.places[i]
	one := []byte{1, 0, 0, 0, 0, 0, 0, 0}
	for range p.wake {
		written := len(p.Arguments())
		h.Do(&p.Request)
		if read := len(p.Arguments()); !p.huge && max(written, read) >= longRequest {
			p.huge = true
			collapse(q.data, i*len(p.payload), (i+1)*len(p.payload))
		}
		q.mu.Lock()
		first := len(q.list) == 0
		q.list = append(q.list, i)
		q.mu.Unlock()
		if first {
			_, _ = unix.Write(q.event, one) // cannot fail: the counter is far from full
		}
	}
}
