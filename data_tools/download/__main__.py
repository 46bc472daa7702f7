"""python -m data_tools.download"""

from data_tools.download.run import main

if __name__ == "__main__":
    main()
