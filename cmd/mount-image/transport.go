package main

import (
	"os"
	"runtime"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/fusefs/uring"
	"github.com/imagestack/imagestack/internal/cli"
)

// transport says how requests come from the kernel.
type transport string

const (
	transportAuto  transport = "auto"  // over io_uring where the kernel offers it
	transportDev   transport = "dev"   // over /dev/fuse
	transportURing transport = "uring" // over io_uring, or fail
)

// moreProcessors lets twice as many goroutines run at a time. A thread that
// waits in the kernel for the next request holds on to one of Go's processors
// until the runtime takes it away, which may be 10 ms later; and what that
// thread has handed over would wait for it.
func moreProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
	}
}

// ringDepth is how many requests of each processor can be under way.
const ringDepth = 16

// makeRings makes the rings for requests over io_uring, if that is wanted,
// while the server still may.
func (srv *server) makeRings() error {
	mode := srv.s.transport
	if mode == transportDev {
		return nil
	}
	err := uring.Available()
	if err == nil {
		srv.rings, err = uring.New(ringDepth, fusefs.MaxRequest)
	}
	switch {
	case err == nil:
	case mode == transportURing:
		return cli.WithHint(err, "--transport=auto goes on without")
	case srv.s.verbose:
		srv.log.Print(err)
	}
	return nil
}

// dropRings gives the rings back, for a disk that the kernel reads by itself.
func (srv *server) dropRings() error {
	r := srv.rings
	if r == nil {
		return nil
	}
	srv.rings = nil
	return r.Close()
}
