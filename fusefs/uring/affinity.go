package uring

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// affinity decides whether the thread of a queue stays on the queue's own
// processor, where the requests are made. There a request and its reply change
// hands without waking another processor, which is best while one request at a
// time is under way (twice as fast). Elsewhere the thread and the program that
// asks work side by side, which is best with many (1.6 times). How many there
// are cannot be seen from here. So now and then the other way is tried for a
// moment, and what gets more done in the same time stays.
type affinity struct {
	move  func(free bool) // to any processor, or home
	free  bool
	phase phase
	begin time.Duration // of the phase
	until time.Duration
	count int // requests in this phase
	here  int // in a window, before the trial
	hold  time.Duration
}

type phase uint8

const (
	holding phase = iota
	counting
	settling
	trying
)

const (
	window    = 10 * time.Millisecond
	shortHold = 100 * time.Millisecond
	longHold  = 1600 * time.Millisecond
	// fewRequests in a window are not worth a trial.
	fewRequests = 64
	// A trial has to be better by so much, in percent.
	better = 115
)

// note counts n requests that were taken until now, a monotonic time.
func (a *affinity) note(n int, now time.Duration) {
	a.count += n
	if now < a.until {
		return
	}
	switch a.phase {
	case holding:
		a.enter(counting, now, window)
	case counting:
		a.here = a.rate(now)
		if a.here < fewRequests {
			a.switchTo(false)
			a.keep(shortHold, now)
			return
		}
		a.switchTo(!a.free)
		a.enter(settling, now, window/4)
	case settling:
		a.enter(trying, now, window)
	case trying:
		if a.rate(now)*100 >= a.here*better {
			a.keep(shortHold, now)
			return
		}
		a.switchTo(!a.free)
		a.keep(min(2*a.hold, longHold), now)
	}
}

// rate is the requests of this phase in the time of a window.
func (a *affinity) rate(now time.Duration) int {
	return int(int64(a.count) * int64(window) / int64(max(now-a.begin, 1)))
}

func (a *affinity) keep(hold time.Duration, now time.Duration) {
	a.hold = max(hold, shortHold)
	a.enter(holding, now, a.hold)
}

func (a *affinity) enter(p phase, now, length time.Duration) {
	a.phase, a.begin, a.until, a.count = p, now, now+length, 0
}

func (a *affinity) switchTo(free bool) {
	if a.free != free {
		a.free = free
		a.move(free)
	}
}

// pin keeps the calling goroutine on one thread, and that on one processor
// until the affinity it returns decides otherwise.
func pin(processor int) *affinity {
	runtime.LockOSThread()
	var home, all unix.CPUSet
	home.Set(processor)
	// Best effort: the processor may not be there, or not be ours.
	known := unix.SchedGetaffinity(0, &all) == nil
	_ = unix.SchedSetaffinity(0, &home)
	return &affinity{move: func(free bool) {
		set := &home
		if free && known {
			set = &all
		}
		_ = unix.SchedSetaffinity(0, set)
	}}
}
