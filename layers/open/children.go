package open

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// Children are the qcow2 images that name the image at path as their backing
// file, as far as they lie in its directory (of a symbolic link: in that of the
// link and in that of the file) or in one of dirs, not below, and not behind
// links that lead out of these. Images in other directories cannot be found;
// what cannot be read is passed over, but for dirs themselves.
func Children(ctx context.Context, path string, dirs ...string) ([]string, error) {
	k, err := LookForChildren(ctx, path, dirs...)
	return k.Children, err
}

// Kin are the qcow2 images around another image.
type Kin struct {
	// Children name it as their backing file.
	Children []string
	// Unclear are those with a header too damaged to tell what they stand on.
	Unclear []string
}

// LookForChildren is Children that also tells of which images it is not known.
func LookForChildren(ctx context.Context, path string, dirs ...string) (Kin, error) {
	all, err := LookForAllChildren(ctx, []string{path}, dirs...)
	if err != nil {
		return Kin{}, err
	}
	return all[0], nil
}

// LookForAllChildren is LookForChildren for each of several images, in the
// directories of all of them.
func LookForAllChildren(ctx context.Context, paths []string, dirs ...string) ([]Kin, error) {
	all := make([]Kin, len(paths))
	bases := make([]os.FileInfo, len(paths))
	var own []string
	for i, path := range paths {
		st, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		homes, err := Homes(path)
		if err != nil {
			return nil, err
		}
		if bases[i] = st; st.Mode().IsRegular() { // a device has no siblings
			own = append(own, homes...)
		}
	}
	places := append(slices.Clone(own), dirs...)
	var permitted []string
	for _, dir := range places {
		if real, err := realPath(dir); err == nil {
			permitted = append(permitted, real)
		}
	}
	var seen []string
	for i, dir := range places {
		real, err := realPath(dir)
		if err != nil {
			return nil, err
		}
		if slices.Contains(seen, real) {
			continue
		}
		seen = append(seen, real)
		found, err := kinIn(ctx, dir, bases, permitted)
		if err != nil && (i >= len(own) || ctx.Err() != nil) {
			return nil, err
		}
		for k, kin := range found {
			all[k].Children, all[k].Unclear = append(all[k].Children, kin.Children...), append(all[k].Unclear, kin.Unclear...)
		}
	}
	return all, nil
}

// Homes are the directories in which the file at path lies: that of the name,
// and of a symbolic link also that of the file.
func Homes(path string) ([]string, error) {
	real, err := realPath(path)
	if err != nil {
		return nil, err
	}
	dir, err := realPath(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	homes := []string{filepath.Dir(path)}
	if other := filepath.Dir(real); other != dir {
		homes = append(homes, other)
	}
	return homes, nil
}

// leadsInto reports whether a link leads to a file in one of the directories.
// Files elsewhere are nobody's business, whoever has put a link to them here.
func leadsInto(link string, dirs []string) bool {
	real, err := realPath(link)
	return err == nil && slices.Contains(dirs, filepath.Dir(real))
}

// kinIn are those in one directory, for each of the bases; permitted are all
// directories that are looked at.
func kinIn(ctx context.Context, dir string, bases []os.FileInfo, permitted []string) ([]Kin, error) {
	all := make([]Kin, len(bases))
	d, err := os.Open(dir)
	if err != nil {
		return all, err
	}
	defer d.Close()
	for {
		list, err := d.ReadDir(1024)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		for _, e := range list {
			if err := ctx.Err(); err != nil {
				return all, err
			}
			child := filepath.Join(dir, e.Name())
			if e.Type()&os.ModeSymlink != 0 && !leadsInto(child, permitted) {
				continue
			}
			st, err := os.Stat(child) // what a link leads to, too
			if err != nil || !st.Mode().IsRegular() || len(bases) == 1 && os.SameFile(st, bases[0]) {
				continue
			}
			name, known := backingName(child)
			parents := standsOn(dir, name)
			for i, base := range bases {
				switch {
				case os.SameFile(st, base):
				case !known:
					all[i].Unclear = append(all[i].Unclear, child)
				case slices.ContainsFunc(parents, func(p os.FileInfo) bool { return os.SameFile(p, base) }):
					all[i].Children = append(all[i].Children, child)
				}
			}
		}
	}
}

// standsOn are the files to which a backing file name in an image in dir may
// lead.
func standsOn(dir, name string) []os.FileInfo {
	var files []os.FileInfo
	for _, name := range fileNames(name) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		if st, err := os.Stat(name); err == nil {
			files = append(files, st)
		}
	}
	return files
}

// fileNames are the files that a backing file name may mean to QEMU: itself,
// without "file:" in front, or what a "json:" description names. (We do not
// follow the latter two, but who looks for children has to know them.)
func fileNames(name string) []string {
	if name == "" {
		return nil
	}
	names := []string{name}
	if rest, ok := strings.CutPrefix(name, "file:"); ok {
		names = append(names, rest)
	}
	rest, ok := strings.CutPrefix(name, "json:")
	var description any
	if !ok || json.Unmarshal([]byte(rest), &description) != nil {
		return names
	}
	for todo := []any{description}; len(todo) > 0; {
		last := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		object, _ := last.(map[string]any)
		for key, value := range object {
			text, ok := value.(string)
			if ok && (key == "filename" || strings.HasSuffix(key, ".filename")) {
				names = append(names, text)
			}
			todo = append(todo, value)
		}
	}
	return names
}

// backingName is the backing file that a qcow2 image names, "" if there is none
// or the file is no such image; known is false when the image cannot tell. What
// the image holds besides does not matter: of one that we cannot open, another
// program may need the base.
func backingName(path string) (name string, known bool) {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return "", true
	}
	defer f.Close()
	name, err = qcow2.BackingName(f)
	var bad *layers.ImageError
	return name, errors.Is(err, layers.ErrFormat) || !errors.As(err, &bad)
}
