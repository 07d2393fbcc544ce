package qcow2fsck

import (
	"os/exec"
	"syscall"
)

// maxRSS is the largest resident size of a finished program in KiB.
func maxRSS(cmd *exec.Cmd) int64 {
	if u, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		return u.Maxrss
	}
	return 0
}
