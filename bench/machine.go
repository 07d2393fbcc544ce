package main

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is what the figures depend on.
type machine struct {
	CPU        string  `json:"cpu"`
	Processors int     `json:"processors"`
	MemoryGiB  float64 `json:"memory_gib"`
	Kernel     string  `json:"kernel"`
	Filesystem string  `json:"filesystem"` // of the images
	Go         string  `json:"go"`
	Fio        string  `json:"fio"`
	QSD        string  `json:"qemu_storage_daemon"`
	QemuImg    string  `json:"qemu_img"`
	Revision   string  `json:"revision"`
	Load       float64 `json:"load_average_at_start"`
}

func describeMachine(ctx context.Context, module, dir string) machine {
	m := machine{Processors: runtime.NumCPU(), Go: runtime.Version(), Load: loadAverage(), Filesystem: filesystemOf(dir)}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				m.CPU = strings.TrimSpace(v)
				break
			}
		}
	}
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		if n, err := parseKiB(string(b), "MemTotal:"); err == nil {
			m.MemoryGiB = float64(n) / (1 << 30)
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	m.Fio = firstLine(ctx, "fio", "--version")
	m.QSD = firstLine(ctx, "qemu-storage-daemon", "--version")
	m.QemuImg = firstLine(ctx, "qemu-img", "--version")
	m.Revision = firstLine(ctx, "git", "-C", module, "describe", "--tags", "--always", "--dirty")
	return m
}

// firstLine of what a command prints, or why there is none.
func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "unknown: " + err.Error()
	}
	s, _, _ := strings.Cut(string(out), "\n")
	return s
}

// filesystemOf names the filesystem that dir lies on.
func filesystemOf(dir string) string {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return "unknown"
	}
	switch int64(st.Type) {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlayfs"
	}
	return "other"
}

// freeSpace is what an ordinary user may still write in dir, in bytes.
func freeSpace(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}
