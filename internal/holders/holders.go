// Package holders finds the processes that keep a filesystem busy.
package holders

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Of names the processes, as "comm (pid)", that have a file on the mount with
// that directory open, mapped or as their working directory. It compares
// paths, not devices, so that it does not have to ask a filesystem whose
// server may be dead. At most limit are named; processes of others are seen by
// root only.
func Of(dir string, limit int) []string {
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	links = append(links, glob("/proc/[0-9]*/root")...)
	links = append(links, glob("/proc/[0-9]*/fd/*")...)
	links = append(links, glob("/proc/[0-9]*/map_files/*")...)
	seen := make(map[string]bool)
	var names []string
	for _, link := range links {
		target, err := os.Readlink(link)
		if err != nil || target != dir && !strings.HasPrefix(target, dir+"/") {
			continue
		}
		pid, _, _ := strings.Cut(strings.TrimPrefix(link, "/proc/"), "/")
		if seen[pid] || len(names) == limit {
			continue
		}
		seen[pid] = true
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		names = append(names, fmt.Sprintf("%s (%s)", strings.TrimSpace(string(comm)), pid))
	}
	return names
}

func glob(pattern string) []string {
	links, _ := filepath.Glob(pattern)
	return links
}
