package main

import (
	"fmt"
	"os"
	"strings"
)

// uringSwitch is the parameter of the module fuse that lets servers carry
// requests over io_uring.
const uringSwitch = "/sys/module/fuse/parameters/enable_uring"

// switchURing turns the parameter on for the time of the run, where root may
// and the transport wants it, and returns how requests of imagestack come.
func switchURing(transport string, cleanup *cleaner) (string, error) {
	const dev = "/dev/fuse"
	if transport == "dev" {
		return dev, nil
	}
	b, err := os.ReadFile(uringSwitch)
	was := strings.TrimSpace(string(b))
	if err == nil && was == "N" {
		if err = os.WriteFile(uringSwitch, []byte("Y"), 0); err == nil {
			cleanup.add(func() error { return os.WriteFile(uringSwitch, []byte("N"), 0) })
		}
	}
	switch {
	case err == nil:
		return "io_uring (" + uringSwitch + " = Y)", nil
	case transport == "uring":
		return "", fmt.Errorf("FUSE over io_uring: %w", err)
	}
	return dev, nil
}
